"""`fastres bench` over a grid of models, batches, image sizes, dtypes and threads."""
