from jaxlm.main import main

if __name__ == "__main__":
    main()
