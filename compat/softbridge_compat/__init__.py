"""The only code that mentions versions of torch, transformers or the toolkits."""
