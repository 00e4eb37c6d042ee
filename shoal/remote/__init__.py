"""Other people's servers in place of our engine. It must not know jobs, rows or files."""
