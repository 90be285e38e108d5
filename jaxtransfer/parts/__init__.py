"""What terms and the heart are built of, an idea a file. Each file stands on a floor of its own: import it by name."""
