"""What every entry point needs around a command: paths, standard streams, words, files, other programs."""
