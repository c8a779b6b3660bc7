"""Curvature of a loss in an adapter's parameters, and calibrated probabilities."""
