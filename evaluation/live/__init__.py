"""What somebody sees who forgets names and restores them: images, guesses, other names."""
