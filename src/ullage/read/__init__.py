"""Outside → spec: one file per format. Files are hostile: bounded sizes, no code of theirs is run."""
