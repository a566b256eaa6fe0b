"""An LED and a button for an assistant: hooks = "assistant_led_button.py" in its assistant.toml.

The button (GPIO 27 to ground) wakes it without a word, stops what it says, sends it to sleep. The
LED (GPIO 17) is off while it sleeps. Needs: sudo apt-get install python3-gpiozero python3-lgpio, or
pip install gpiozero lgpio
"""

LED_PIN, BUTTON_PIN = 17, 27
# state → seconds on, seconds off; None: on, 0: off
LIGHTS = {
    "asleep": 0,
    "listening": None,
    "hearing": None,
    "answering": (0.5, 0.5),
    "following": None,
    "ringing": (0.1, 0.1),
    "away": (0.05, 2.0),
}


def connect(press):
    """Called once, with what the button is to do. Returns what is called with each state."""
    from gpiozero import LED, Button

    led = LED(LED_PIN)
    button = Button(BUTTON_PIN, bounce_time=0.05)
    button.when_pressed = press

    def on_state(state):
        light = LIGHTS[state]
        if light is None:
            led.on()
        elif light:
            led.blink(*light)
        else:
            led.off()

    on_state.led, on_state.button = led, button  # they live as long as this does
    return on_state
