"""What a file, a trace or a law of lengths would do on machines that need not be here. Loads no torch."""
