"""From a FeatureBundle and a change of the projection to accuracies, and from those to logs."""
