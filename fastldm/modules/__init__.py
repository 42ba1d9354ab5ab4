"""Building blocks of the models; their parameter names are diffusers'."""
