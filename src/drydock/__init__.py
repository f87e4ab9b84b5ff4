"""drydock: reproducible environments for LLM reinforcement-learning stacks."""
