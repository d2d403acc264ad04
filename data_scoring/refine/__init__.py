"""Selecting the next mix by losses: policies, the draw, selection and mixing."""
