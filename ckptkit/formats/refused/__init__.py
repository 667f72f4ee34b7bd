"""What is refused: what a file is that is no checkpoint, what is left of one that was cut short, what it names."""
