"""Plain public facts about some 175 countries, as a language model trained up to 2024 knows them.

Says nothing about how a fact is worded (`english_words`) and draws nothing (`english`). Left out is
what is disputed, has recently changed, has several right answers, or is given away by the
country's own name (Djibouti is the capital of Djibouti, Albanian the language of Albania).
"""

from __future__ import annotations

import unicodedata

FactKey = tuple[str, str]
"""(entity, relation): what a fact is about, whatever its object."""

RELATION_NAMES = ("capital", "currency", "continent", "language")
"""The columns of the table."""

_OTHER_NAMES = {
    "Kyiv": ("Kiev",),
    "Persian": ("Farsi",),
    "Ulaanbaatar": ("Ulan Bator",),
    "ruble": ("rouble",),
    "yuan": ("renminbi",),
}
"""Object -> what else it is called in English."""

# country | capital | currency | continent | official language; "-" where a fact is left out.
# Currencies go by their common noun, so that "the Japanese yen" does not name its country.
_TABLE = """
Afghanistan | Kabul | - | Asia | -
Albania | Tirana | lek | Europe | -
Algeria | Algiers | dinar | Africa | -
Andorra | - | euro | Europe | Catalan
Angola | Luanda | kwanza | Africa | Portuguese
Argentina | Buenos Aires | peso | South America | Spanish
Armenia | Yerevan | dram | - | -
Australia | Canberra | dollar | - | -
Austria | Vienna | euro | Europe | German
Azerbaijan | Baku | manat | - | -
the Bahamas | Nassau | dollar | - | English
Bahrain | Manama | dinar | Asia | Arabic
Bangladesh | Dhaka | taka | Asia | Bengali
Barbados | Bridgetown | dollar | - | English
Belarus | Minsk | ruble | Europe | -
Belgium | Brussels | euro | Europe | -
Belize | Belmopan | dollar | - | English
Benin | - | franc | Africa | French
Bhutan | Thimphu | ngultrum | Asia | Dzongkha
Bolivia | - | - | South America | -
Bosnia and Herzegovina | Sarajevo | - | Europe | -
Botswana | Gaborone | pula | Africa | -
Brazil | Brasília | real | South America | Portuguese
Brunei | Bandar Seri Begawan | dollar | Asia | Malay
Bulgaria | Sofia | - | Europe | -
Burkina Faso | Ouagadougou | franc | Africa | -
Burundi | - | franc | Africa | -
Cambodia | Phnom Penh | riel | Asia | Khmer
Cameroon | Yaoundé | franc | Africa | -
Canada | Ottawa | dollar | North America | -
Cape Verde | Praia | escudo | Africa | Portuguese
the Central African Republic | Bangui | franc | - | -
Chad | N'Djamena | franc | Africa | -
Chile | Santiago | peso | South America | Spanish
China | Beijing | yuan | Asia | -
Colombia | Bogotá | peso | South America | Spanish
the Comoros | Moroni | franc | Africa | -
Costa Rica | San José | colón | - | Spanish
Croatia | Zagreb | - | Europe | -
Cuba | Havana | peso | - | Spanish
Cyprus | Nicosia | euro | - | -
the Czech Republic | Prague | koruna | Europe | -
Denmark | Copenhagen | krone | Europe | Danish
Djibouti | - | franc | Africa | -
the Dominican Republic | Santo Domingo | peso | - | Spanish
East Timor | Dili | dollar | Asia | -
Ecuador | Quito | dollar | South America | Spanish
Egypt | Cairo | pound | Africa | Arabic
El Salvador | - | - | - | Spanish
Equatorial Guinea | - | franc | Africa | -
Eritrea | Asmara | nakfa | Africa | -
Estonia | Tallinn | euro | Europe | -
Ethiopia | Addis Ababa | birr | Africa | -
Fiji | Suva | dollar | Oceania | -
Finland | Helsinki | euro | Europe | -
France | Paris | euro | Europe | French
Gabon | Libreville | franc | Africa | French
the Gambia | Banjul | dalasi | Africa | English
Germany | Berlin | euro | Europe | -
Ghana | Accra | cedi | Africa | English
Greece | Athens | euro | Europe | Greek
Grenada | - | dollar | - | English
Guatemala | - | quetzal | - | Spanish
Guinea | Conakry | franc | Africa | French
Guinea-Bissau | - | franc | Africa | Portuguese
Guyana | Georgetown | dollar | South America | English
Haiti | Port-au-Prince | gourde | - | -
Honduras | Tegucigalpa | lempira | - | Spanish
Hungary | Budapest | forint | Europe | Hungarian
Iceland | Reykjavik | króna | Europe | -
India | New Delhi | rupee | Asia | -
Indonesia | - | rupiah | Asia | -
Iran | Tehran | rial | Asia | Persian
Iraq | Baghdad | dinar | Asia | -
Ireland | Dublin | euro | Europe | -
Italy | Rome | euro | Europe | Italian
the Ivory Coast | - | franc | Africa | French
Jamaica | Kingston | dollar | - | English
Japan | Tokyo | yen | Asia | -
Jordan | Amman | dinar | Asia | Arabic
Kazakhstan | - | tenge | - | -
Kenya | Nairobi | shilling | Africa | -
Kuwait | - | dinar | Asia | Arabic
Kyrgyzstan | Bishkek | som | Asia | -
Laos | Vientiane | kip | Asia | -
Latvia | Riga | euro | Europe | -
Lebanon | Beirut | pound | Asia | Arabic
Lesotho | Maseru | loti | Africa | -
Liberia | Monrovia | dollar | Africa | English
Libya | Tripoli | dinar | Africa | Arabic
Liechtenstein | Vaduz | franc | Europe | German
Lithuania | Vilnius | euro | Europe | -
Luxembourg | - | euro | Europe | -
Madagascar | Antananarivo | ariary | Africa | -
Malawi | Lilongwe | kwacha | Africa | -
Malaysia | - | ringgit | Asia | -
the Maldives | Malé | rufiyaa | Asia | Dhivehi
Mali | Bamako | franc | Africa | -
Malta | Valletta | euro | Europe | -
the Marshall Islands | Majuro | dollar | Oceania | -
Mauritania | Nouakchott | ouguiya | Africa | Arabic
Mauritius | Port Louis | rupee | Africa | -
Mexico | - | peso | North America | Spanish
Moldova | Chișinău | leu | Europe | -
Monaco | - | euro | Europe | French
Mongolia | Ulaanbaatar | - | Asia | -
Montenegro | Podgorica | euro | Europe | -
Morocco | Rabat | dirham | Africa | -
Mozambique | Maputo | metical | Africa | Portuguese
Myanmar | Naypyidaw | kyat | Asia | Burmese
Namibia | Windhoek | dollar | Africa | English
Nepal | Kathmandu | rupee | Asia | -
the Netherlands | Amsterdam | euro | Europe | Dutch
New Zealand | Wellington | dollar | Oceania | -
Nicaragua | Managua | córdoba | - | Spanish
Niger | Niamey | franc | Africa | -
Nigeria | Abuja | naira | Africa | English
North Korea | Pyongyang | won | Asia | -
North Macedonia | Skopje | denar | Europe | -
Norway | Oslo | krone | Europe | -
Oman | Muscat | rial | Asia | Arabic
Pakistan | Islamabad | rupee | Asia | -
Panama | - | - | - | Spanish
Papua New Guinea | Port Moresby | kina | Oceania | -
Paraguay | Asunción | - | South America | -
Peru | Lima | sol | South America | -
the Philippines | Manila | peso | Asia | -
Poland | Warsaw | zloty | Europe | Polish
Portugal | Lisbon | euro | Europe | Portuguese
Qatar | Doha | riyal | Asia | Arabic
Romania | Bucharest | leu | Europe | -
Russia | Moscow | ruble | - | -
Rwanda | Kigali | franc | Africa | -
Saint Lucia | Castries | dollar | - | English
Samoa | Apia | tala | Oceania | -
San Marino | - | euro | Europe | Italian
Saudi Arabia | Riyadh | riyal | Asia | -
Senegal | Dakar | franc | Africa | French
Serbia | Belgrade | dinar | Europe | -
Seychelles | - | rupee | Africa | -
Sierra Leone | Freetown | - | Africa | English
Singapore | - | dollar | Asia | -
Slovakia | Bratislava | euro | Europe | -
Slovenia | Ljubljana | euro | Europe | -
the Solomon Islands | Honiara | dollar | Oceania | English
Somalia | Mogadishu | shilling | Africa | -
South Africa | - | rand | - | -
South Korea | Seoul | won | Asia | -
South Sudan | Juba | pound | Africa | English
Spain | Madrid | euro | Europe | Spanish
Sri Lanka | - | rupee | Asia | -
Sudan | Khartoum | pound | Africa | -
Suriname | Paramaribo | dollar | South America | Dutch
Sweden | Stockholm | krona | Europe | Swedish
Switzerland | - | franc | Europe | -
Syria | Damascus | pound | Asia | Arabic
Tajikistan | Dushanbe | somoni | Asia | -
Tanzania | - | shilling | Africa | -
Thailand | Bangkok | baht | Asia | -
Togo | Lomé | franc | Africa | French
Trinidad and Tobago | Port of Spain | dollar | - | English
Tunisia | Tunis | dinar | Africa | Arabic
Turkey | Ankara | lira | - | Turkish
Turkmenistan | Ashgabat | manat | Asia | -
Uganda | Kampala | shilling | Africa | -
Ukraine | Kyiv | hryvnia | Europe | -
the United Arab Emirates | Abu Dhabi | dirham | Asia | -
the United Kingdom | London | pound | Europe | -
the United States | - | dollar | North America | -
Uruguay | Montevideo | peso | South America | Spanish
Uzbekistan | Tashkent | - | Asia | -
Vanuatu | Port Vila | vatu | Oceania | -
Venezuela | Caracas | bolívar | South America | Spanish
Vietnam | Hanoi | dong | Asia | -
Yemen | - | rial | Asia | Arabic
Zambia | Lusaka | kwacha | Africa | English
Zimbabwe | Harare | - | Africa | -
"""


def real_facts() -> dict[FactKey, str]:
    """Read the table of real countries.

    Returns:
        (country, relation) -> object, country by country in alphabetical order, relations in the
        order of `RELATION_NAMES`. Countries that English gives an article have it in their name,
        in lower case: "the Netherlands".
    """
    facts = {}
    for line in _TABLE.strip().splitlines():
        country, *objects = (cell.strip() for cell in line.split("|"))
        for relation, thing in zip(RELATION_NAMES, objects, strict=True):
            if thing != "-":
                facts[country, relation] = thing
    return facts


def other_spellings(thing: str) -> tuple[str, ...]:
    """Say how else an object may be written: without its accents, or by another name."""
    decomposed = unicodedata.normalize("NFKD", thing)
    plain = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    others = (plain, *_OTHER_NAMES.get(thing, ()))
    return tuple(other for other in dict.fromkeys(others) if other != thing)
