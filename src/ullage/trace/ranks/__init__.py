"""One rank of many: a group of fake ranks, and models wrapped and split over it."""
