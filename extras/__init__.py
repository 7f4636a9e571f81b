"""Around danube3.py: what the programs need, and a reader of the model does not."""
