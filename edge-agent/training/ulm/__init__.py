"""How Segue's micro language model (μLM) is made: see ../README.md."""
