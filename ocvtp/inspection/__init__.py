"""What methods keep of images, measured without a language model."""
