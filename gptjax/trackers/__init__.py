"""What a run reports, also in TensorBoard, Weights & Biases or Trackio."""
