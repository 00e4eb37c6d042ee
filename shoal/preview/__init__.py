"""What a file will do before it is run: its rows, its prefixes, its time; and what is wrong with its lines."""
