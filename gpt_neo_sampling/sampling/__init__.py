"""From logits to a token, on mtf tensors; knows no model."""
