"""The demonstration: one small VAE on heterogeneous data, without the impartiality block and with it."""
