"""The parts of a Hub repository besides the weights: the origin of the model, and a model card."""
