"""What a Hub repository holds besides the weights: the origin of the model, and a model card."""
