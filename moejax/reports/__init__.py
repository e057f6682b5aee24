"""Tables and figures of documents, made from the JSON records of experiments."""
