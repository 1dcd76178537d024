"""What can be done besides plain fine-tuning: one file each, with its paper; train.py puts them into Trainer."""
