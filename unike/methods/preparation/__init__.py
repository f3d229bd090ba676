"""What is learnt once, before the first edit: knowledge, scope classifiers, editors."""
