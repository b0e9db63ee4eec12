"""What somebody sees who forgets names and gives them back: images, guesses, neighbours."""

from evaluation.live.look import Live

__all__ = ["Live"]
