"""The verbs of the command line beyond Lightning's own; one file each. They import what they need when they run."""
