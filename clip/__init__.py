"""What is built on a CLIP: texts to hidden states, images to embeddings, both to bundles."""

from clip.architectures import ARCHITECTURES, architecture
from clip.bundle import FeatureBundle, bundle_path, list_bundles, load_bundle
from clip.source import ClipSource

__all__ = [
    "ARCHITECTURES",
    "ClipSource",
    "FeatureBundle",
    "architecture",
    "bundle_path",
    "list_bundles",
    "load_bundle",
]
