"""From losses to the next mix: policies, the draw, selection and mixing."""
