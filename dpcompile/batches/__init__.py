"""Which drawn batch a call of the model trains on."""
