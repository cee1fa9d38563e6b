"""The atomic concepts of the study, in words: two phrases for each, and the sentences of each corpus they stand in.

A class of a corpus is named as its file names it. What can be computed from a text is in ``predicates``.
"""

from __future__ import annotations

from typing import NamedTuple

Phrases = tuple[str, str]


class Sentences(NamedTuple):
    """What is said of a phrase, and that the contrary holds; the last of each is never trained."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]


SENTENCES = {
    "questions": Sentences(
        ("The question asks for {}.", "Is {} what the question wants to know?", "Questions whose answer is {}"),
        (
            "The question does not ask for {}.",
            "Is something other than {} what the question wants to know?",
            "Questions whose answer is not {}",
        ),
    ),
    "newswire": Sentences(
        ("The report is about {}.", "Is this financial news on {}?", "Newswire stories that deal with {}"),
        (
            "The report is not about {}.",
            "Is this financial news on something other than {}?",
            "Newswire stories that do not deal with {}",
        ),
    ),
    "posts": Sentences(
        ("The message was posted to a group on {}.", "Is this a discussion of {}?", "Posts about {}"),
        (
            "The message was not posted to a group on {}.",
            "Is this a discussion of something other than {}?",
            "Posts that are not about {}",
        ),
    ),
    "exams": Sentences(
        ("The exam question belongs to {}.", "Is this a question of {}?", "Medical questions in the field of {}"),
        (
            "The exam question does not belong to {}.",
            "Is this a question of something other than {}?",
            "Medical questions outside of the field of {}",
        ),
    ),
    "articles": Sentences(
        ("The article is about {}.", "Is this a news story on {}?", "News articles from the section on {}"),
        (
            "The article is not about {}.",
            "Is this a news story on something other than {}?",
            "News articles from a section other than that on {}",
        ),
    ),
    "predicates": Sentences(
        ("The text contains {}.", "Does the text have {}?", "Texts in which there is {}"),
        ("The text does not contain {}.", "Does the text lack {}?", "Texts in which there is not {}"),
    ),
}

QUESTIONS: dict[str, Phrases] = {
    "ABBR:abb": ("an abbreviation", "the short form or acronym of a long name"),
    "ABBR:exp": ("what an abbreviation stands for", "the full form of an acronym"),
    "DESC:def": ("a definition", "what a word or thing means"),
    "DESC:desc": ("a description", "an explanation of what something is like"),
    "DESC:manner": ("how something is done", "the way or the means by which something happens"),
    "DESC:reason": ("a reason", "why something is so"),
    "ENTY:animal": ("an animal", "the name of a beast, bird or fish"),
    "ENTY:body": ("a part of the body", "an organ or a limb"),
    "ENTY:color": ("a colour", "what color something has"),
    "ENTY:cremat": ("a creative work", "the title of a book, a film or a song"),
    "ENTY:dismed": ("a disease or a medicine", "an illness, a phobia or a drug"),
    "ENTY:event": ("an event", "the name of a war, a holiday or a disaster"),
    "ENTY:food": ("a food or a drink", "something that people eat or drink"),
    "ENTY:instru": ("a musical instrument", "what somebody plays music on"),
    "ENTY:lang": ("a language", "the tongue that people speak"),
    "ENTY:letter": ("a letter of the alphabet", "a single character such as a or z"),
    "ENTY:plant": ("a plant", "the name of a tree or a flower"),
    "ENTY:product": ("a product", "a brand or an article that is sold"),
    "ENTY:sport": ("a sport or a game", "what athletes play"),
    "ENTY:substance": ("a substance", "a material, an element or a metal"),
    "ENTY:symbol": ("a symbol", "a sign or an emblem"),
    "ENTY:techmeth": ("a technique", "a method or a procedure"),
    "ENTY:termeq": ("an equivalent term", "another word for the same thing"),
    "ENTY:veh": ("a vehicle", "a ship, a car or an aircraft"),
    "ENTY:word": ("a word with a special property", "the wording of a phrase or a motto"),
    "HUM:desc": ("who a person is", "what somebody is known for"),
    "HUM:gr": ("a group or an organisation", "the name of a company or a team"),
    "HUM:ind": ("a person", "the name of an individual"),
    "HUM:title": ("a person's title", "the profession or the rank of somebody"),
    "LOC:city": ("a city", "the name of a town or a capital"),
    "LOC:country": ("a country", "the name of a nation"),
    "LOC:mount": ("a mountain", "the name of a peak or a range"),
    "LOC:other": ("a place", "where something is"),
    "LOC:state": ("a state of the USA", "which American state something is in"),
    "NUM:count": ("a count", "how many there are of something"),
    "NUM:date": ("a date", "the year or the day when something happened"),
    "NUM:dist": ("a distance", "how far, how tall or how long something is"),
    "NUM:money": ("an amount of money", "what something costs"),
    "NUM:perc": ("a percentage", "a fraction, a rate or odds"),
    "NUM:period": ("a length of time", "how long something lasts or how old somebody is"),
    "NUM:volsize": ("a size", "how big something is in area or volume"),
    "NUM:weight": ("a weight", "how heavy something is"),
}

NEWSWIRE: dict[str, Phrases] = {
    "acq": ("mergers and acquisitions", "one company buying another"),
    "alum": ("aluminium", "makers of aluminum and its price"),
    "bop": ("the balance of payments", "a country's current account"),
    "carcass": ("meat", "beef and pork carcasses"),
    "cocoa": ("cocoa", "cocoa beans and their buffer stock"),
    "coffee": ("coffee", "coffee exports and quotas"),
    "copper": ("copper", "copper mines and smelters"),
    "cotton": ("cotton", "cotton crops and bales"),
    "cpi": ("consumer prices", "the inflation that shoppers see"),
    "crude": ("crude oil", "oil fields, barrels and petroleum prices"),
    "earn": ("earnings", "a company's quarterly profit and dividend"),
    "fuel": ("fuel oil", "prices of heavy fuel for ships and plants"),
    "gas": ("petrol", "gasoline and octane"),
    "gnp": ("gross national product", "the growth of a whole economy"),
    "gold": ("gold", "gold mines and bullion"),
    "grain": ("grain", "wheat, corn and other cereals"),
    "heat": ("heating oil", "posted prices of number two oil"),
    "housing": ("housing", "the number of new homes"),
    "income": ("personal income", "what households earn and spend"),
    "interest": ("interest rates", "a bank that changes its lending rate"),
    "ipi": ("industrial production", "the output of factories"),
    "iron-steel": ("iron and steel", "steelmakers and ore"),
    "jobs": ("jobs", "the number of unemployed people"),
    "lei": ("leading economic indicators", "an index that announces a boom or a recession"),
    "livestock": ("livestock", "cattle, hogs and other farm animals"),
    "lumber": ("lumber", "timber and sawmills"),
    "money-fx": ("foreign exchange", "the dollar, the yen and other currencies"),
    "money-supply": ("the money supply", "the growth of M1 and bank deposits"),
    "nat-gas": ("natural gas", "gas wells and pipelines"),
    "orange": ("oranges", "frozen orange juice"),
    "pet-chem": ("petrochemicals", "plants for ethylene and plastics"),
    "reserves": ("monetary reserves", "a central bank's holdings of gold and currencies"),
    "retail": ("retail sales", "what shops and stores have sold"),
    "rubber": ("rubber", "natural rubber and its pact"),
    "ship": ("shipping", "vessels, ports and seamen"),
    "strategic-metal": ("strategic metals", "uranium, tungsten and cobalt"),
    "sugar": ("sugar", "sugar beet and cane"),
    "tin": ("tin", "the tin council and its metal"),
    "trade": ("international trade", "tariffs, surpluses and trade disputes"),
    "veg-oil": ("vegetable oil", "palm oil and soybean oil"),
    "wpi": ("wholesale prices", "the index of producers' prices"),
    "zinc": ("zinc", "zinc smelters and their price"),
}

POSTS: dict[str, Phrases] = {
    "alt.atheism": ("atheism", "people who do not believe in a god"),
    "comp.graphics": ("computer graphics", "images, rendering and file formats of pictures"),
    "comp.os.ms-windows.misc": ("Microsoft Windows", "the operating system of Microsoft and its files"),
    "comp.sys.ibm.pc.hardware": ("PC hardware", "disk drives and boards of IBM compatible computers"),
    "comp.sys.mac.hardware": ("Macintosh hardware", "Apple's Macs and their parts"),
    "comp.windows.x": ("the X Window System", "X servers, Motif and widgets on Unix"),
    "misc.forsale": ("things for sale", "second-hand goods, offers and shipping"),
    "rec.autos": ("cars", "automobiles and their engines"),
    "rec.motorcycles": ("motorcycles", "bikes, riders and helmets"),
    "rec.sport.baseball": ("baseball", "pitchers, innings and home runs"),
    "rec.sport.hockey": ("ice hockey", "NHL teams, goalies and playoffs"),
    "sci.crypt": ("cryptography", "encryption, keys and the clipper chip"),
    "sci.electronics": ("electronics", "circuits, voltages and components"),
    "sci.med": ("health and medicine", "diseases, doctors and treatments"),
    "sci.space": ("space", "rockets, orbits and NASA"),
    "soc.religion.christian": ("Christianity", "Christ, the church and the Bible"),
    "talk.politics.guns": ("gun politics", "firearms and the right to bear them"),
    "talk.politics.mideast": ("the Middle East", "Israel, the Arabs, Turks and Armenians"),
    "talk.politics.misc": ("American politics", "the president, taxes and rights"),
    "talk.religion.misc": ("religion in general", "cults, prophets and morals"),
}

EXAMS: dict[str, Phrases] = {
    "Anaesthesia": ("anaesthesia", "putting patients to sleep for an operation"),
    "Anatomy": ("anatomy", "nerves, muscles, bones and where they lie"),
    "Biochemistry": ("biochemistry", "enzymes, vitamins and metabolism"),
    "Dental": ("dentistry", "teeth, gums and fillings"),
    "ENT": ("ear, nose and throat", "hearing, sinuses and the larynx"),
    "Forensic_Medicine": ("forensic medicine", "wounds, poisons and the law"),
    "Gynaecology_Obstetrics": ("gynaecology and obstetrics", "pregnancy, birth and the uterus"),
    "Medicine": ("internal medicine", "the diagnosis of diseases of adults"),
    "Microbiology": ("microbiology", "bacteria, viruses and parasites"),
    "Ophthalmology": ("ophthalmology", "the eye and its diseases"),
    "Orthopaedics": ("orthopaedics", "fractures, joints and bones"),
    "Pathology": ("pathology", "tumours, cells and tissue under the microscope"),
    "Pediatrics": ("paediatrics", "infants and children"),
    "Pharmacology": ("pharmacology", "drugs, their doses and side effects"),
    "Physiology": ("physiology", "how a healthy body works"),
    "Psychiatry": ("psychiatry", "disorders of the mind"),
    "Radiology": ("radiology", "X-rays, scans and radiation"),
    "Skin": ("dermatology", "rashes and the skin"),
    "Social_Preventive_Medicine": ("public health", "epidemics, statistics and health programmes"),
    "Surgery": ("surgery", "operations, injuries and tumours to be cut out"),
}

ARTICLES: dict[str, Phrases] = {
    "business": ("business", "companies, markets and the economy"),
    "entertainment": ("entertainment", "films, music and celebrities"),
    "politics": ("politics", "parties, ministers and elections"),
    "sports": ("sports", "matches, players and championships"),
    "tech": ("technology", "computers, phones and the internet"),
}

CLASSES = {
    "questions": QUESTIONS,
    "newswire": NEWSWIRE,
    "posts": POSTS,
    "exams": EXAMS,
    "articles": ARTICLES,
}
"""Corpus -> its classes."""
