"""What somebody sees who forgets names and restores them: images, guesses, other names."""

from evaluation.live.look import Live

__all__ = ["Live"]
