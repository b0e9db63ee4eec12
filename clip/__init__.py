"""What is built on a CLIP: texts to hidden states, images to embeddings, both to bundles."""
