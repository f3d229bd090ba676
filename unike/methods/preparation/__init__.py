"""What is prepared once, before the first edit: knowledge, scope classifiers, meta-learned editors."""
