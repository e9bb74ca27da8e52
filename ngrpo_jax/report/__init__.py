"""Pages for people, made from the files of a workdir."""
