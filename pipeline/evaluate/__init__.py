"""What a trained model is worth, one file an evaluator."""
