"""What a program needs of its machine: files, processes, faults, versions, text, progress."""
