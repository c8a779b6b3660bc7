"""How the weights of a base are stored: dense, packed, on another device."""
