"""What gradients tell: curvature, and calibrated probabilities."""
