"""The policy: building or loading the model, its forward pass, its tokenizer."""
