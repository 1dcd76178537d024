"""A pretrained checkpoint to a task model, on Hugging Face's Trainer."""
