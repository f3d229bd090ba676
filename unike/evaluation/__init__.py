"""What is asked before and after an edit, how it is scored, and how scores are summed up."""
