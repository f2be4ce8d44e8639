"""Networks that torchvision, timm and Hugging Face's hub publish, with the preprocessing and the classes of their weights."""
