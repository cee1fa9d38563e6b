"""Descriptions that say nothing of any task."""

BLANK = "-"
UNRELATED = (
    "The kettle has been on the stove for ten minutes.",
    "A violin has four strings, tuned in fifths.",
    "Water the tomatoes early in the morning.",
    "The ferry to the island leaves at noon from the north pier.",
    "Granite forms when magma cools slowly below the surface.",
    "She folded the blue blanket and put it on the chair.",
    "Add two spoons of flour and stir until the sauce thickens.",
    "Most owls hunt at night and sleep in hollow trees.",
    "lantern quarry velvet nine umbrella drift",
    "copper ladder sideways moss fourteen pillow",
    "Please close the garden gate behind you.",
    "The tunnel through the mountain is seven kilometres long.",
    "walnut orbit gently brick harbour seldom",
    "Three sheep stood in the shade of the barn.",
    "Turn left at the bakery, then follow the river.",
)
