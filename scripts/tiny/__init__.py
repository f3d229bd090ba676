"""Training and data of the two embedded tiny backbones."""
