"""Where a name on the command line becomes code: a registry for each family of methods, whose rows write --help."""
