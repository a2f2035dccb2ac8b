"""The user functions of the All Tools suite: a small made-up world whose answers never change.

    from openglm.eval.all_tools.functions import FUNCTIONS, get_weather
    get_weather("Oslo")           # {'city': 'Oslo', 'condition': 'rain', 'temperature_c': 7, 'humidity_percent': 88}

Cities and people are known by their English and their Chinese names. What cannot be served raises ValueError, which
says what can.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

__all__ = ["ALIASES", "FUNCTIONS", "canonical"]

# Other names of a thing, to the one under which it is stored.
ALIASES = {
    "北京": "beijing", "上海": "shanghai", "成都": "chengdu", "广州": "guangzhou", "里斯本": "lisbon", "奥斯陆": "oslo",
    "内罗毕": "nairobi", "多伦多": "toronto", "杭州": "hangzhou", "李梅": "li mei", "王强": "wang qiang",
    "安娜·科斯塔": "ana costa", "安娜科斯塔": "ana costa", "汤姆·贝克": "tom becker", "汤姆贝克": "tom becker",
    "蓝灯": "blue lantern", "蓝灯餐厅": "blue lantern", "竹园": "bamboo garden", "竹园餐厅": "bamboo garden",
    "the blue lantern": "blue lantern", "blue lantern restaurant": "blue lantern",
    "bamboo garden restaurant": "bamboo garden", "the bamboo garden": "bamboo garden",
}  # fmt: skip

_WEATHER = {
    "beijing": ("cloudy", 18, 40), "shanghai": ("light rain", 26, 81), "chengdu": ("fog", 14, 92),
    "guangzhou": ("thunderstorm", 31, 77), "lisbon": ("sunny", 24, 55), "oslo": ("rain", 7, 88),
    "nairobi": ("partly cloudy", 22, 63), "toronto": ("snow", -3, 70), "hangzhou": ("sunny", 21, 58),
}  # fmt: skip
_CONTACTS = {
    "li mei": ("+86 571 5550 1382", "li.mei@example.com", "hangzhou"),
    "wang qiang": ("+86 28 5550 7741", "wang.qiang@example.com", "chengdu"),
    "ana costa": ("+351 21 555 0169", "ana.costa@example.com", "lisbon"),
    "tom becker": ("+1 416 555 0127", "tom.becker@example.com", "toronto"),
}
_EVENTS = {
    "2026-03-09": [("09:30", "Dentist"), ("15:00", "Budget review with Ana Costa")],
    "2026-03-10": [("11:15", "Video call with Wang Qiang")],
    "2026-04-21": [("08:05", "Train to Hangzhou"), ("19:30", "Dinner with Li Mei")],
    "2026-05-02": [],
}
_ORDERS = {
    "A1047": ("delivered", 3, "CNY", 1289.5), "A1093": ("in transit", 1, "EUR", 74.2),
    "B2210": ("cancelled", 2, "USD", 315.0), "B2288": ("waiting for payment", 12, "CNY", 8640.0),
}  # fmt: skip
_TRAINS = {
    ("beijing", "shanghai"): [("G105", "08:20", 338), ("G117", "13:45", 322)],
    ("chengdu", "guangzhou"): [("D1832", "07:05", 581)],
    ("shanghai", "hangzhou"): [("G7341", "09:10", 57), ("G7377", "17:30", 62)],
}  # train, departure, minutes
_IN_USD = {"USD": 1.0, "EUR": 1.1, "CNY": 0.14, "JPY": 0.0068, "GBP": 1.28}
_UNITS = {
    "km": ("length", 1000.0), "m": ("length", 1.0), "mile": ("length", 1609.344), "foot": ("length", 0.3048),
    "kg": ("mass", 1.0), "pound": ("mass", 0.45359237), "ounce": ("mass", 0.028349523125),
    "liter": ("volume", 1.0), "us_gallon": ("volume", 3.785411784),
}  # fmt: skip

Unit = Literal["km", "m", "mile", "foot", "kg", "pound", "ounce", "liter", "us_gallon"]
Currency = Literal["USD", "EUR", "CNY", "JPY", "GBP"]


def canonical(name: str) -> str:
    """The stored form of a name: lower case, single spaces, English."""
    name = " ".join(name.split()).lower()
    return ALIASES.get(name, name)


def _known(table: Mapping[str, Any], name: str, what: str) -> str:
    key = canonical(name)
    if key not in table:
        raise ValueError(f"no {what} {name!r}; known are {', '.join(k.title() for k in table)}")
    return key


def _day(date: str) -> str:
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
        raise ValueError(f"the date must be YYYY-MM-DD, not {date!r}")
    return date


def _clock(time: str) -> str:
    if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", time):
        raise ValueError(f"the time must be HH:MM, not {time!r}")
    return time


def _code(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:6].upper()


def get_weather(city: str) -> dict[str, Any]:
    """Current weather in a city.

    Args:
        city: name of the city, such as Oslo
    """
    key = _known(_WEATHER, city, "city")
    condition, temperature, humidity = _WEATHER[key]
    return {"city": key.title(), "condition": condition, "temperature_c": temperature, "humidity_percent": humidity}


def list_events(date: str) -> dict[str, Any]:
    """The user's calendar entries of one day.

    Args:
        date: the day, as YYYY-MM-DD
    """
    events = _EVENTS.get(_day(date), [])
    return {"date": date, "events": [{"time": time, "title": title} for time, title in events]}


def convert_units(value: float, from_unit: Unit, to_unit: Unit) -> dict[str, Any]:
    """Convert a length, mass or volume to another unit.

    Args:
        value: the number to convert
        from_unit: unit of the value
        to_unit: unit of the result
    """
    (kind, scale), (other, target) = _UNITS[from_unit], _UNITS[to_unit]
    if kind != other:
        raise ValueError(f"{from_unit} is a {kind} and {to_unit} a {other}: they do not convert")
    return {"value": round(value * scale / target, 4), "unit": to_unit}


def convert_currency(amount: float, source: Currency, target: Currency) -> dict[str, Any]:
    """Convert an amount of money at today's rate of the user's bank.

    Args:
        amount: how much money
        source: currency of the amount
        target: currency wanted
    """
    return {"amount": round(amount * _IN_USD[source] / _IN_USD[target], 2), "currency": target}


def find_contact(name: str) -> dict[str, Any]:
    """Phone number, e-mail address and city of a person in the user's address book.

    Args:
        name: full name of the person
    """
    key = _known(_CONTACTS, name, "contact")
    phone, email, city = _CONTACTS[key]
    return {"name": key.title(), "phone": phone, "email": email, "city": city.title()}


def get_order(order_id: str) -> dict[str, Any]:
    """Status, number of items and total price of an order of the user.

    Args:
        order_id: number of the order, such as A1000
    """
    key = order_id.strip().upper()
    if key not in _ORDERS:
        raise ValueError(f"no order {order_id!r}; known are {', '.join(_ORDERS)}")
    status, n_items, currency, total = _ORDERS[key]
    return {"order_id": key, "status": status, "n_items": n_items, "total": total, "currency": currency}


def book_table(restaurant: str, date: str, time: str, people: int) -> dict[str, Any]:
    """Book a table in a restaurant; gives a confirmation code.

    Args:
        restaurant: name of the restaurant
        date: the day, as YYYY-MM-DD
        time: the time, as HH:MM (24 hours)
        people: number of guests
    """
    if not 1 <= people <= 20:
        raise ValueError(f"a table is for 1 to 20 people, not {people}")
    name = canonical(restaurant)
    return {"restaurant": name.title(), "confirmation": _code("table", name, _day(date), _clock(time), people)}


def set_reminder(text: str, date: str, time: str) -> dict[str, Any]:
    """Remind the user of something; gives the number of the reminder.

    Args:
        text: what to be reminded of
        date: the day, as YYYY-MM-DD
        time: the time, as HH:MM (24 hours)
    """
    return {"reminder": _code("reminder", _day(date), _clock(time)), "text": text, "at": f"{date} {time}"}


def find_trains(origin: str, destination: str) -> dict[str, Any]:
    """Trains between two cities: number, departure and minutes of travel.

    Args:
        origin: city of departure
        destination: city of arrival
    """
    found = _TRAINS.get((canonical(origin), canonical(destination)), [])
    trains = [{"train": name, "departure": at, "minutes": minutes} for name, at, minutes in found]
    return {"origin": canonical(origin).title(), "destination": canonical(destination).title(), "trains": trains}


FUNCTIONS: tuple[Callable[..., dict[str, Any]], ...] = (
    get_weather, list_events, convert_units, convert_currency, find_contact, get_order, book_table, set_reminder,
    find_trains,
)  # fmt: skip
