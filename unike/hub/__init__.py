"""Knowledge, meta-learned editors and scope classifiers on the Hugging Face hub."""
