"""What is refused: what a file is that is not a checkpoint, what is left of one that was cut short, what it names."""
