"""What a model is evaluated on: tasks, a model's answers to them, and their scores."""
